"""Published code, written anew, that ours is measured against."""
