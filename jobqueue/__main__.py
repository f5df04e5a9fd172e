"""`python -m jobqueue`: the command line."""

from jobqueue.cli import main

if __name__ == "__main__":
    main(prog_name="jobqueue")
