"""Attribution from one trained model: influence functions, TRAK, TracIn and the task Hessian."""
