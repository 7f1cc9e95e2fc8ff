"""`python -m profiling gpu`: everything that is measured on a GPU, in minutes and without a network. It needs PyTorch, Triton,
transformers and PEFT, and nothing else.

    kernels   every kernel against float64
    layers    single layers of the paper's models, all methods, decode and prefill
    models    whole models with random weights: decode steps, throughput and latency by rank
    promises  what was found, held against what is promised
"""
