-- The keys beside KEYS[1], all of one slot; keys.py spells the same names.
local slot = string.match(KEYS[1], "^{[^}]*}:")
local HOLDS, LEASES = slot .. "holds", slot .. "leases"
local LEDGER, HEAD = slot .. "ledger", slot .. "head"

local function wallet_of(account)
  return slot .. "wallet:" .. account
end

-- An idempotency key of a client, by its hash.
local function idem_of(account, hash)
  return slot .. "idem:" .. account .. ":" .. hash
end

-- What has ended is remembered by the time inside its id, ten minutes to a hash.
local function done_of(id)
  return slot .. "done:" .. string.format("%.0f", math.floor(tonumber(string.sub(id, 5, 16), 16) / 600000))
end
