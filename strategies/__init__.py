"""How the server joins the clients' replies; every strategy is a small subclass of Flower's FedAvg."""
