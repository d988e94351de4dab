"""Predictors: from what a host has routed so far to logits over the experts of later layers."""

from specgate.predictors.registry import predictor_class, predictor_names, register

__all__ = ["predictor_class", "predictor_names", "register"]
