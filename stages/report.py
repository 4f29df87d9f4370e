"""Stage report: tables, figures and the page of the profile."""

from stages.common import run

if __name__ == "__main__":
    run("report")
