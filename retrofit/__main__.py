"""Run the command line as `python -m retrofit`, which is how launchers start it."""

from retrofit.commands import main

if __name__ == "__main__":
    main()
