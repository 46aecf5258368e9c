"""`python -m ats_detr COMMAND ...` is `ats-detr COMMAND ...`."""

from ats_detr.cli import run_command

if __name__ == "__main__":
    run_command()
