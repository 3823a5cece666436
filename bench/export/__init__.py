"""Exports at full width: every net through every format and setting, and packed layers against float ones."""
