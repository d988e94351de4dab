"""Training of the small reference MoEs: ``python -m specgate.moe.pretrain moe=switch_ref``."""
