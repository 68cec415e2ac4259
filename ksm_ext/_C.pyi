# Importing it registers the operators of torch.ops.ksm_ext; it has no names of its own.
