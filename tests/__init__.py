"""The tests; the folders mirror specgate/."""
