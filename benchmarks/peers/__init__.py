"""The RIN on the CPU beside everything that computes the same network: see README.md here, and `make bench-peers`."""
