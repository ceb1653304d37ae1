"""Recording without slowing the device down; files and TensorBoard; the machine; FLOP/s."""
