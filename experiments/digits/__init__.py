"""Which of 20 groups of handwritten digits carry wrong labels?"""
