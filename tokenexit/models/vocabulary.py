"""The name that `tokenexit.text.vocabulary` had before."""

from tokenexit.text.vocabulary import *  # noqa: F403
