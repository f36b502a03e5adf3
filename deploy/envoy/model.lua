-- Names the model that a request asks for, for the log, and sets how long its first replica has before the request goes to a second one
-- as well (a hedge: the first response is used, whoever sends it).
--
-- A replica that hangs without closing its connections keeps what it has. A request that only takes long must not be done twice: so the
-- wait is three times what the model lately took, and 1.5 s at least. What it took is the time of the replica that responded, and goes
-- down by 2 % a response; so the wait grows with a queue, and under overload no request is sent twice.
local FLOOR_MS, FACTOR, DECAY = 1500, 3, 0.98
local HEDGE = "x-envoy-upstream-rq-per-try-timeout-ms"
local TRY = "x-convscope-try-ms"  -- Set by the route.
local NAMESPACE = "convscope"
local UNKNOWN = "-"
local MOST = 64
local lately_ms, count = {}, 0  -- By model. A message can name another model here than TorchServe reads, so names are counted.

-- The model of a gRPC request: field 1 of the message behind five bytes of framing. nil if it is compressed or starts otherwise.
local function model_of_message(body)
  if body == nil or body:length() < 8 then return nil end
  local start = body:getBytes(0, math.min(body:length(), 80))
  local compressed, tag, length = start:byte(1), start:byte(6), start:byte(7)
  if compressed == 0 and tag == 10 and length < 74 then return start:sub(8, 7 + length) end
end

function envoy_on_request(handle)
  local model = handle:headers():get(":path"):match("^/%l+/([%w._-]+)")
  if handle:streamInfo():routeName() == "grpc" then model = model_of_message(handle:body()) end
  if model == nil or not model:find("^[%w._-]+$") then model = UNKNOWN end
  handle:streamInfo():dynamicMetadata():set(NAMESPACE, "model", model)
  handle:headers():replace(HEDGE, string.format("%d", math.max(FLOOR_MS, FACTOR * (lately_ms[model] or 0))))
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local took_ms = tonumber(headers:get(TRY) or "")
  headers:remove(TRY)
  local about = handle:streamInfo():dynamicMetadata():get(NAMESPACE)
  if took_ms == nil or about == nil or headers:get(":status") ~= "200" or headers:get("grpc-status") ~= nil then return end
  if lately_ms[about.model] == nil then
    if count >= MOST then lately_ms, count = {}, 0 end
    count = count + 1
  end
  lately_ms[about.model] = math.max(took_ms, DECAY * (lately_ms[about.model] or 0))
end
