-- Gives TorchServe's own gRPC errors the status that says whose they are, before the gateway decides whether to send the request again.
-- TorchServe answers INTERNAL for nearly everything, a model that does not exist included; its message is kept.
local STATUS = {
  ["^Model not found"] = "5",  -- NOT_FOUND
  ["does not exist for model"] = "5",
  ["^Parameter model_name is required"] = "3",  -- INVALID_ARGUMENT
  ["has no worker to serve"] = "14",  -- UNAVAILABLE: its queue is full.
}

function envoy_on_response(handle)
  local headers = handle:headers()
  if headers:get("grpc-status") ~= "13" then return end
  local message = headers:get("grpc-message") or ""
  for pattern, status in pairs(STATUS) do
    if message:find(pattern) then headers:replace("grpc-status", status) end
  end
end
