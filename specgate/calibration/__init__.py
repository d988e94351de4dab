"""Honest probabilities: calibrators, confidence decay over horizons, conformal prefetch sets, a drift monitor,
loading a calibrated checkpoint.
"""
