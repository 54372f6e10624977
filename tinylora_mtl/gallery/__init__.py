"""Related methods, one file each: what changes from LoRA or from R-LoRA, and nothing else.

A file has LR, the learning rate on the embedded model, and a class `Layer` that takes the place of a linear layer, a
function `gradients(model, batch, config)` as in `train.py`, or both. --method NAME trains with NAME.py. A layer is made
as Layer(base, config), config being an AdapterConfig, and is a subclass of LoRALinear or MultiHeadLoRALinear. Its
Parameters train; what is to be saved with them, but not trained, is a buffer.
"""
