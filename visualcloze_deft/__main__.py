"""python -m visualcloze_deft: the command line."""

from visualcloze_deft.cli import main

if __name__ == "__main__":
    main()
