"""Stage plan: write what decides the result of each stage."""

from stages.common import run

if __name__ == "__main__":
    run("plan")
