"""The RIN on the CPU beside everything that computes the same network: `make bench-peers`, and ../NOTES-peers.md."""
