"""Honest probabilities: temperature scaling, confidence decay over horizons, loading a calibrated
checkpoint.
"""
