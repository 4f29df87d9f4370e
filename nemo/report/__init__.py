"""Tables, figures and one offline page from finished results; imports no torch.

Everything is read from the files that params.yaml names and is byte-identical for identical files.
Training reads results for MLflow where pandas need not be installed, so nothing is imported here.
"""
