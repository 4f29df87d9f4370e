"""What each stage does, for DVC, for the command line and for `nemo modularize` alike."""
