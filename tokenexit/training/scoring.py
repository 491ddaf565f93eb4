"""The name that `tokenexit.text.scoring` had before."""

from tokenexit.text.scoring import *  # noqa: F403
