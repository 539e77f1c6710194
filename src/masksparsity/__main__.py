"""`python -m masksparsity`, which is how torchrun starts it."""

from masksparsity.cli import main

if __name__ == "__main__":
    main()
