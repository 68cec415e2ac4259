"""Which tasks and objectives help which, in reinforcement learning?"""
