"""`python -m train.cli` is `mora`."""

from train.cli.main import main

main()
