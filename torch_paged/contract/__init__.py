"""What the ops are: signatures, rules, fakes, the autograd rule and the reference."""
