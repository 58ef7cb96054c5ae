"""What `align data check` finds in files before anything is trained on them. Torch-free; bounded memory."""
