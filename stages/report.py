"""Stage report: tables, figures and the page of the profile; MLflow is brought up to date."""

from stages.common import run

if __name__ == "__main__":
    run("report", "--publish")
