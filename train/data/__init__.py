"""What is learnt from: texts and images as TFDS data sets, their order, and how they are read and built."""
