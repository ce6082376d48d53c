"""`python -m velora_torch`, which is how `torchrun -m` starts the command."""

from velora_torch.cli import main

if __name__ == "__main__":
    main()
