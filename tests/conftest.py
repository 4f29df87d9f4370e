import torch

# Two workers share two cores; with more threads than cores, OpenMP waits more than it works.
torch.set_num_threads(1)
