"""What both training loops need: device, state on disk, learning rate, averages, log."""
