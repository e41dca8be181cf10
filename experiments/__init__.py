"""What people run: Flower apps as folders of configuration, the ServerApp, the commands, the run folder."""
