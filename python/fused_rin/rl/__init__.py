"""Recurrent policies for two libraries of reinforcement learning: `fused_rin.rl.sb3` and `fused_rin.rl.torchrl`.

Neither is loaded with this package: they need what `pip install "fused-rin[rl]"` brings.
"""
