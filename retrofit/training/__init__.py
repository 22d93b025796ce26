"""Short fine-tunes of a patched network against its dense teacher."""
