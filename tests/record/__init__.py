"""A record of results, to the bit: what a change that is meant to change nothing is held against (:mod:`tests.record.record`)."""
