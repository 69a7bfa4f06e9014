from fused_rin.experiments.cli import main

main()
