"""The step (plain, no Ray), the Ray worker around it, and the trainer."""
