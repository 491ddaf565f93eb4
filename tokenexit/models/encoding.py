"""The name that `tokenexit.text.encoding` had before."""

from tokenexit.text.encoding import *  # noqa: F403
