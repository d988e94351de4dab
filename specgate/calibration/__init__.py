"""Honest probabilities: calibrators, confidence decay over horizons, conformal prefetch sets, a monitor of
drift, loading a calibrated checkpoint.
"""
