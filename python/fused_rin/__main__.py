from fused_rin.experiments.cli import main

if __name__ == "__main__":
    main()
