"""What unlearning did to the neurons: influence variation."""
