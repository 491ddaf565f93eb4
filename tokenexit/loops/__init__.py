"""The loops over layers: one contract, `tokenexit.reference.exit_forward`, done in several ways."""
