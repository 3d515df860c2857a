"""Networks: the blocks both stages share, and the time-conditional U-Net."""
