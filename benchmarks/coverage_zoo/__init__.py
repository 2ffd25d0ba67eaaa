"""The models on which coverage is measured, one file a library, and the check that each must pass."""
