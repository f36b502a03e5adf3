-- Replaces the API key of a request by its SHA-256 digest (FIPS 180-4), before it is looked up among the digests of keys.yaml.
--
-- How long a look-up takes depends on what is looked up. Of a digest that tells nothing: nobody can make a key whose digest
-- comes nearer to a known one byte by byte. And keys.yaml holds no key that could be used by who reads it.
local band, bnot, bxor, rrotate, rshift, tobit = bit.band, bit.bnot, bit.bxor, bit.ror, bit.rshift, bit.tobit
local LONGEST = 256  -- Bytes of a key; a longer one is refused unread.

-- The first 32 bits of the fractional parts of the square roots of the first 8 primes, and of the cube roots of the first 64.
local INITIAL, ROUND = {}, {}
do
  local candidate = 2
  while #ROUND < 64 do
    local prime = true
    for divisor = 2, math.sqrt(candidate) do
      prime = prime and candidate % divisor ~= 0
    end
    if prime then
      if #INITIAL < 8 then INITIAL[#INITIAL + 1] = tobit(math.floor(candidate ^ (1 / 2) % 1 * 2 ^ 32)) end
      ROUND[#ROUND + 1] = tobit(math.floor(candidate ^ (1 / 3) % 1 * 2 ^ 32))
    end
    candidate = candidate + 1
  end
end

local function digest(text)
  local length = #text
  local padded = text .. "\128" .. string.rep("\0", (55 - length) % 64) .. "\0\0\0\0"
    .. string.char(rshift(length, 21) % 256, rshift(length, 13) % 256, rshift(length, 5) % 256, length * 8 % 256)
  local state, w = {unpack(INITIAL)}, {}
  for start = 1, #padded, 64 do
    for i = 1, 16 do
      local one, two, three, four = padded:byte(start + i * 4 - 4, start + i * 4 - 1)
      w[i] = tobit(one * 2 ^ 24 + two * 2 ^ 16 + three * 2 ^ 8 + four)
    end
    for i = 17, 64 do
      local x, y = w[i - 15], w[i - 2]
      w[i] = tobit(w[i - 16] + bxor(rrotate(x, 7), rrotate(x, 18), rshift(x, 3)) + w[i - 7]
        + bxor(rrotate(y, 17), rrotate(y, 19), rshift(y, 10)))
    end
    local a, b, c, d, e, f, g, h = state[1], state[2], state[3], state[4], state[5], state[6], state[7], state[8]
    for i = 1, 64 do
      local first = h + bxor(rrotate(e, 6), rrotate(e, 11), rrotate(e, 25)) + bxor(band(e, f), band(bnot(e), g)) + ROUND[i] + w[i]
      local second = bxor(rrotate(a, 2), rrotate(a, 13), rrotate(a, 22)) + bxor(band(a, b), band(a, c), band(b, c))
      h, g, f, e, d, c, b, a = g, f, e, tobit(d + first), c, b, a, tobit(first + second)
    end
    for i, value in ipairs({a, b, c, d, e, f, g, h}) do state[i] = tobit(state[i] + value) end
  end
  for i = 1, 8 do state[i] = bit.tohex(state[i]) end
  return table.concat(state)
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local key = headers:get("x-api-key")
  if key ~= nil then
    headers:replace("x-api-key", #key <= LONGEST and digest(key) or "too long")
  end
end
