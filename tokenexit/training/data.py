"""The name that `tokenexit.text.data` had before."""

from tokenexit.text.data import *  # noqa: F403
