"""Run the command line from a checkout: `python cli.py --help`."""

from retrofit.commands import main

if __name__ == "__main__":
    main()
